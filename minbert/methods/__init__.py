"""What the papers are about: losses, SMART, gradient surgery, and one gradient for each task."""
