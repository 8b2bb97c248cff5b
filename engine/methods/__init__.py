"""One file a method; the file name is the slug with underscores. Found by scanning this folder."""
