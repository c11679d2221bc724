"""One small file per published system: claim, baseline, workload, verdict. Nothing stands here yet."""
