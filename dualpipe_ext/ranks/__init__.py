"""What ranks share: groups, agreement over a store, peer memory, rows that move between ranks.

May import: what gradients may, and build_record.
"""
