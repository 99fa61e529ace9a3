"""What is asked of data: splits, tasks, requests of impressions, batches."""
