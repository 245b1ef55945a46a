"""What agreement means: cases, the rounding that honesty allows on each, and the one comparison."""
