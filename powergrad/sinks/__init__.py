"""Other people's tools: a run's history as they read it, made from what is stored, so that a stop and a resume leave one clean history."""
