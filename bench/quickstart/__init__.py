"""How the shipped model was made, and what it can do. A run needs none of it."""
