"""An HTTP server with the image API of OpenAI over one accelerated pipeline. Needs the extra `serve`."""
