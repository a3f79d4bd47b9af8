"""The models that come with fastdiff; their captioned scenes are rendered and marked in `fastdiff.bench`."""
