"`python -m helpers.without_network CONFIG CALLS`: train, and write each attempt to reach another machine to a file"
import socket
import sys
import threading

connect_to = socket.socket.connect

def refuse(*address):
    with open(sys.argv[2], 'a') as file:
        file.write(f'{address}\n')
    raise OSError('no network')

def connect(self, address):
    if self.family == socket.AF_UNIX or address[0] in ('127.0.0.1', '::1'):
        return connect_to(self, address)
    return refuse(address)

def train_without_network():
    socket.socket.connect = connect
    socket.socket.connect_ex = connect
    socket.getaddrinfo = refuse
    # imported here: a module could keep the functions that are replaced
    from rtsseg.config import load
    from rtsseg.training import train
    train(load(sys.argv[1]))
    # threads that would report to somebody
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(3)

if __name__ == '__main__':
    train_without_network()
