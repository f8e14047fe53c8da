#!/usr/bin/env bash
# A Slurm of this machine alone, with accounting. As root, after: apt-get install slurm-wlm slurmdbd munge mariadb-server
set -euo pipefail
folder=$(realpath "${1:?usage: tests/slurm_here.sh FOLDER}")
name=$(hostname -s)
mkdir -p /run/munge /run/mysqld "$folder"/{state,spool,logs}
[ -f /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge; chmod 400 /etc/munge/munge.key
chown mysql: /run/mysqld
pgrep -x munged > /dev/null || runuser -u munge -- /usr/sbin/munged
pgrep -x mariadbd > /dev/null || { mariadbd-safe --user=mysql > "$folder/logs/mariadb" 2>&1 & }
for _ in $(seq 60); do mariadb -e 'select 1' > /dev/null 2>&1 && break; sleep 1; done
mariadb -e "create database if not exists slurm_acct_db; create user if not exists slurm@localhost identified by 'slurm';
            grant all on slurm_acct_db.* to slurm@localhost"
cat > /etc/slurm/slurmdbd.conf <<CONF
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$folder/logs/slurmdbd
PidFile=$folder/slurmdbd.pid
CONF
chmod 600 /etc/slurm/slurmdbd.conf
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=here
SlurmctldHost=$name
SlurmUser=root
AuthType=auth/munge
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
JobAcctGatherParams=OverMemoryKill
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/logs/slurmctld
SlurmdLogFile=$folder/logs/slurmd
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
NodeName=$name CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo) State=UNKNOWN
PartitionName=here Nodes=$name Default=YES MaxTime=INFINITE State=UP
CONF
pgrep -x slurmdbd > /dev/null || /usr/sbin/slurmdbd
for _ in $(seq 60); do sacctmgr -n list cluster > /dev/null 2>&1 && break; sleep 1; done
sacctmgr -i add cluster here > /dev/null 2>&1 || true
sacctmgr -i add account here description=here > /dev/null 2>&1 || true
sacctmgr -i add user root account=here > /dev/null 2>&1 || true
pgrep -x slurmctld > /dev/null || /usr/sbin/slurmctld
pgrep -x slurmd > /dev/null || /usr/sbin/slurmd
for _ in $(seq 60); do sinfo -h -t idle,mix,alloc 2> /dev/null | grep -q here && exit 0; sleep 1; done
echo "no node came up; see $folder/logs" >&2
exit 1
