"""`kvferry curve`: how well a receiver does for how many measured bytes, for any ways of sending."""
