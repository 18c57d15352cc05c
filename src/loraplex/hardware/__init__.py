"""What others say of devices, instances, prices and bases, with date and source. Nothing here is measured."""
