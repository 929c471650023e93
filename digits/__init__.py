"""The domain: what an image of a digit is, and the network that reads it.

Shared by the client, the server and the trainer; knows nothing of any of them.
Importing the package costs nothing: `preprocessing` needs NumPy and Pillow,
only `network` and `checkpoint` need torch.
"""
