"""What all front doors share: a loaded pipeline that draws, its settings, its ranks, and the words on stderr."""
