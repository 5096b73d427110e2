"""The job domain: spec, state machine, store, lifecycle, artifacts. Torch-free; knows no HTTP and no queue."""
