"The command of guide 004: python main_train.py --model LMV-Net …, or accelerate launch main_train.py …"
import sys

from rtsseg.cli import call, set_hash_seed

def train():
    "What the flags of this program mean"
    from rtsseg.systems.survival import train_by_flags
    train_by_flags(sys.argv[1:])

if __name__ == '__main__':
    set_hash_seed()
    sys.exit(call(train, resumes=True))
