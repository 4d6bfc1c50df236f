"What tests share"
