"""Pictures, charts and pages of what was computed."""
