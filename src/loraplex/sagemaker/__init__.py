"""Amazon SageMaker: what it loads (`artifact/`), what runs in its containers (`container.py` in our images and
`handlers.py` in AWS's), and how its endpoints are made (`endpoints/`). Its HTTP routes are in `server/sagemaker.py`."""
