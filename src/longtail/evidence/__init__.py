"""Whether what is committed is what the code gives: `longtail verify`, and `longtail adopt` for code that changed."""
