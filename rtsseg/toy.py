import numpy as np, pandas as pd
from pathlib import Path
from rtsseg.data import write_raster
def make_toy(source, path): raise NotImplementedError
def tiny_toy(folder, **kw):
    folder=Path(folder); rng=np.random.default_rng(0); rows=[]
    import rasterio
    from rasterio.transform import from_origin
    for k in range(96):
        img=rng.normal(100,10,(64,64,3)); m=np.zeros((64,64),np.uint8)
        if k%4==0: y,x=rng.integers(8,40,2); img[y:y+14,x:x+14]+=40; m[y:y+14,x:x+14]=1
        t=from_origin(1e6+k%12*192, 1e6-(k//12)*192,3,3)
        for n,a,c in (('images',img.clip(0,255).astype('uint8').transpose(2,0,1),3),('masks',m[None],1)):
            p=folder/n/f't{k:03d}.tif'; p.parent.mkdir(exist_ok=True,parents=True)
            with rasterio.open(p,'w',driver='GTiff',width=64,height=64,count=c,dtype='uint8',crs='EPSG:3413',transform=t) as d: d.write(a)
        rows.append(dict(tile_id=f't{k:03d}',image=f'images/t{k:03d}.tif',mask=f'masks/t{k:03d}.tif',split=['train','train','val','test'][k//12%4],region='r'+str(k//48),block=f'b{k//6}'))
    pd.DataFrame(rows).to_csv(folder/'manifest.csv',index=False)
    return folder/'manifest.csv'
