"The search index and the front door: encode, compare and search in words and pictures."
