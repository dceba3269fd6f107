"""The contract between ops and backends, and what the backends share."""
