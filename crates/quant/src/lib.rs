//! Group codes, the byte layout of planes, and the allocator of choices under budgets.
