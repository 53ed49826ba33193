"""Where examples come from: the zoo's worlds, texts, questions in JSON lines, data sets. One small file each."""
