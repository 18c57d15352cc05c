"""How well classifiers answer labelled conversations."""
