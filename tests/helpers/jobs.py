"""Commands as jobs: what each finds, what it leaves, and how it is killed, starved or joined by another one. What a job
leaves where nothing disturbs it is what the next one finds"""
import hashlib
import shutil
from dataclasses import dataclass

import pandas as pd

from helpers.attempt import Changes, attempt, note_modules
from helpers.maps import noise, write_scene
from helpers.runs import tiny
from helpers.worlds import OFTEN, SYSTEMS, system_config
from rtsseg.config import Loader, to_yaml

# of the training of these tests, and of trials
SHORT = dict(epochs=2, batch_size=8, checkpoint=OFTEN, calibrate=dict(ratio=1, target_precision=.1),
             metrics=dict(ratios=[1], monitor='pr_auc@1', replicates=20))
RUN, MODEL_OF_RUN = '{run}', '{run}/model'

@dataclass
class Job:
    "A command"
    words: list           # `{folder}`: the work folder, `{run}`: the run folder in it
    after: str = ''       # the job whose result it finds; '': data and configs
    kills: int = 4        # in the suite
    roles: tuple = ()     # processes that are killed alone
    system: str = ''      # whose config, made by `system_config`, it finds too
    refuses: str = ''     # what it says, with code 2, where all is done

JOBS = {
    'train': Job(['rtsseg-train', '--config', '{folder}/tiny.yaml'], '', 8, ('command', 'trainer', 'worker')),
    'evaluate': Job(['rtsseg-evaluate', '--run', RUN], 'train', 6),
    'calibrate': Job(['rtsseg-calibrate', '--run', RUN], 'evaluate', 6),
    'test': Job(['rtsseg-evaluate', '--run', RUN, '--split', 'test'], 'calibrate', 4),
    'report': Job(['rtsseg-report', '--run', RUN], 'test', 4),
    'predict': Job(['rtsseg-predict', '--model', MODEL_OF_RUN, '--scene', '{folder}/scene.tif', '--out',
                    '{folder}/map.tif'], 'calibrate', 8),
    'map': Job(['rtsseg-map', '--model', MODEL_OF_RUN, '--scenes', '{folder}/scenes.csv', '--out', '{folder}/maps',
                '--workers', '2', '--expiry', '1', '--windows', '6'], 'calibrate', 8, ('command', 'worker')),
    'export': Job(['rtsseg-export', '--model', MODEL_OF_RUN, '--out', '{folder}/exported', '--formats', 'onnx'],
                  'calibrate', 4, refuses='exported exists'),
    'search': Job(['rtsseg-search', '--config', '{folder}/tiny.yaml', '--space', '{folder}/space.yaml', '--trials',
                   '2'], '', 3),
} | {
    f'train {name}': Job(['rtsseg-train', '--config', f'{{folder}}/{name}.yaml', '--inline'], kills=2, system=name)
    for name in SYSTEMS
}

# what depends on the time of day, what names a process, and what counts attempts
OWN_TIME = ('log.jsonl', 'test_ledger.json', 'environment.json', 'study.db', 'study.pkl', 'history.png',
            'importance.png')

# folders of an attempt; a worker that outlives its command may still claim a part that is done
OF_ATTEMPTS = {'checkpoints', 'claims', 'clocks'}

def is_result(path, folder):
    "Whether a file is a result, and not about an attempt; what a writer left that died has a hidden name"
    parts = path.relative_to(folder).parts
    is_named = not any(part.startswith('.') for part in parts)
    return path.is_file() and is_named and path.name not in OWN_TIME and not OF_ATTEMPTS & set(parts)

def content(path):
    "What of a file is a result"
    if path.name == 'trials.csv':
        # attempts that were killed are listed too, and numbered
        table = pd.read_csv(path).query('state == "complete"')
        return table.drop(columns=['trial', 'note']).sort_values('run').to_csv(index=False).encode()
    if path.name == 'best.yaml':
        # its first line names the number of the trial
        return path.read_bytes().partition(b'\n')[2]
    return path.read_bytes()

def digests(folder):
    "{name: SHA-256} of what a job leaves"
    files = [path for path in sorted(folder.rglob('*')) if is_result(path, folder)]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(content(path)).hexdigest() for path in files}

def size_on_disk(folder):
    "Bytes of all files, in pages"
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob('*') if path.is_file())

class Works:
    "States of one folder, made once by the jobs themselves"

    def __init__(self, home, jobs=JOBS):
        self.home, self.work, self.jobs, self.measured = home, home/'disk'/'work', jobs, {}
        self.beside = {}

    def state(self, name):
        "The folder that a job leaves; '' is what the first one finds"
        path = self.home/f'state {name}'
        if path.exists():
            return path
        if name:
            self.restore(name)
            changes, before = Changes(), size_on_disk(self.work)
            done = self.attempt(name, changes.prepare, note_modules(self.home/f'{name}.modules'))
            assert done.code == 0, done.printed
            self.measured[name] = changes.counts(), done.seconds, size_on_disk(self.work) - before
        else:
            self.begin()
        shutil.copytree(self.work, path, symlinks=True)
        return path

    def begin(self):
        "A toy world, configs, a scene and a list of scenes"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        cfg = tiny(self.work, **SHORT).model_copy(update=dict(loader=Loader(num_workers=1, timeout=10)))
        (self.work/'tiny.yaml').write_text(to_yaml(cfg))
        (self.work/'space.yaml').write_text('loss.gamma: [2, 0]\n')
        write_scene(self.work/'scene.tif', noise(150, 100))
        write_scene(self.work/'other.tif', noise(70, 90))
        pd.DataFrame(dict(scene=['scene.tif', 'other.tif'])).to_csv(self.work/'scenes.csv', index=False)

    def restore_result(self, name):
        "Put into the work folder what a job leaves"
        state = self.state(name)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(state, self.work, symlinks=True)

    def restore(self, name):
        "Put into the work folder what a job finds"
        job = self.jobs[name]
        self.restore_result(job.after)
        if job.system:
            config = self.home/f'{job.system}.yaml'
            if not config.exists():
                config.write_text(to_yaml(system_config(job.system, self.home, self.work/'runs')))
            shutil.copy(config, self.work)

    def words(self, name):
        "The words of a job's command"
        run = next(self.work.glob('runs/tiny/*/seed42'), '')
        return [word.replace('{run}', str(run)).replace('{folder}', str(self.work)) for word in self.jobs[name].words]

    def attempt(self, name, prepare=lambda: None, end=lambda: None):
        "Run the command of a job in the work folder"
        return attempt(self.work, self.words(name), prepare, end)

    def measured_of(self, name):
        "Changes on disk, CPU seconds and written bytes of a job"
        self.state(name)
        return self.measured[name]

    def expected_after(self, name, before):
        "{name: SHA-256} of what a job leaves in the result of another one where nothing disturbs it"
        if (name, before) not in self.beside:
            self.restore_result(before)
            done = self.attempt(name)
            assert done.code == 0, done.printed
            self.beside[name, before] = digests(self.work)
        return self.beside[name, before]

    def expected(self, name):
        "{name: SHA-256} of what a job leaves where nothing disturbs it"
        return digests(self.state(name))
