"""What finds out, and says, what is wrong; it changes nothing."""
