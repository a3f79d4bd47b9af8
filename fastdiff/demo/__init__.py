"""A page in the browser that draws the same picture with and without fastdiff. Needs gradio (extra `demo`)."""
