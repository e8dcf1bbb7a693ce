"""What a hook does when it is registered empty, one file per hook."""
