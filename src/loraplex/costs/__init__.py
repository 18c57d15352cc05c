"""What classifiers cost a month: an endpoint for each, one for all, or a hosted API."""
