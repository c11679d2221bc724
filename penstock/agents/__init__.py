"""Programs that use models and tools: graphs, memory, sandboxes. Refuses: HTTP. Nothing stands here yet."""
