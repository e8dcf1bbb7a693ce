"""Media items: header probing, fetching and decoding."""
