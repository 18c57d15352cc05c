"""What a base with adapters needs before it is loaded: work, memory, time, and the machines that have room for it."""
