"""Documents in, passages out. Refuses: calling models itself. Nothing stands here yet."""
