"""An OpenAI-compatible server over context stores, in one process or on Ray Serve."""
