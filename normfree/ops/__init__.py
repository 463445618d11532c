"""Operations with a custom backward pass or a choice of implementations; nothing here knows networks."""
