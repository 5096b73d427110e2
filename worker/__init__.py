"""The worker: a Celery app whose one task is to supervise trainer processes. No torch in this process."""
