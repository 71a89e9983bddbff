"""What a user passes, validated once and described by one frozen object for the operators."""
