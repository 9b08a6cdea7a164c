"""AdamW and what hands it to Trainer."""
