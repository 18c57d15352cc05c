"""The artifact that SageMaker loads: a bundle as an archive or a folder, packed, checked and verified."""
