"""The app that lays runs over each other: data, numbers, charts, classification, pages."""
