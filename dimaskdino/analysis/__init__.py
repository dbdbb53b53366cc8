"""Looking into models: what they cost, how fast they are, and why they miss what they miss."""
