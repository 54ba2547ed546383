"""The website: chapters, figures, and pages; it imports all of `paramspec`."""
