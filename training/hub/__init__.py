"""What is published, and its way to the Hub."""
