import asyncio, os, time
from tests.integration.wallet_service.conftest import *
from tests.integration.wallet_service.test_wallet_process import *
def cpu(pid):
    f=open(f"/proc/{pid}/stat").read().rsplit(")",1)[1].split()
    return (int(f[11])+int(f[12]))/os.sysconf("SC_CLK_TCK")
import pytest
@pytest.mark.parametrize("proj",["true","false"])
async def test_cpu(start_wallet, valkey_bus, proj):
    w = await start_wallet(wallet_projection=proj, wallet_segment_bytes=1<<24)
    await valkey_bus.publish([captured(f"W-{i}", time_ns=now(), seller_account=f"S{i%40}") for i in range(200)])
    await asyncio.sleep(1.5)
    for rate,n in ((50,400),(400,3000)):
        msgs=[[captured(f"O-{rate}-{i}", time_ns=now(), seller_account=f"S{i%40}", amount=1), captured(f"P-{rate}-{i}", time_ns=now(), seller_account=f"S{(i+7)%40}", amount=1)] for i in range(n//2)]
        c=cpu(w.process.pid); t=time.time()
        for m in msgs:
            await valkey_bus.publish(m); await asyncio.sleep(max(0, t+ (msgs.index(m)+1)*2/rate - time.time()) if rate<100 else 2/rate)
        await asyncio.sleep(1)
        d=time.time()-t
        print(f"projection={proj} ~{n/d:.0f} events/s: wallet cpu {1e6*(cpu(w.process.pid)-c)/n:.0f} us/event")
    c=cpu(w.process.pid); await asyncio.sleep(5); print(f"idle cpu {(cpu(w.process.pid)-c)/5*100:.2f} %")
