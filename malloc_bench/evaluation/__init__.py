"""prefill -> compress -> read -> judge: what is asked, how answers are ranked, and the metrics."""
