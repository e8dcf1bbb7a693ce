"""What `make demo` shows: questions asked through both services, and a page on which the answers can be looked at."""
