"""Reports of finished runs as Markdown, HTML and SVG. No torch."""
