"""Side-by-side runs of `rerank` and its peers. Every statement about speed in this repository comes from here."""
