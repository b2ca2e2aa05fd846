"""Where bytes go. `local` is the one seam through which lastgood touches a file system."""
