"""Load generators and figures behind `runtime bench`."""
