"""Measures systems that answer the same classifiers, each under the same load. `loraplex bench` runs it."""
